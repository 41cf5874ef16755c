"""Implementations of attention, each with `why_not(problem)`: the reasons why it cannot run that problem."""
