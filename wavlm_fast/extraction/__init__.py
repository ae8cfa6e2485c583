"""Features of corpora: what is read, what is computed, where it is written, how a run goes on after a stop."""
