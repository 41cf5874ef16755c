"""Execution of validated calls: the choice of a backend, torch operators, their derivatives and the call cache."""
