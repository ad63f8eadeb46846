"""One file for each revision. Expand only: the version before must be able to work on what a revision leaves."""
