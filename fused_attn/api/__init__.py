"""The public functions: their signatures, and the validation of their arguments into a Problem."""
