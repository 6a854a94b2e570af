"""Predictions against outcomes: a log of decisions, and how far off they were, term by term."""
