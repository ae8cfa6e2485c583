"""Whole models: what is run, by whom, how it is verified, timed and counted."""
