"""The settings of a run, their file and their command-line flags."""
