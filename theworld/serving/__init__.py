"""Asking a checkpoint about a photograph, on the command line or on a local page."""
