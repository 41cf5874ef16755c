"""The functions that users call: their signatures, and the checks that make a Problem of their arguments."""
