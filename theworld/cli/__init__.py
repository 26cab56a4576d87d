"""Tools that span all phases: dry runs, the doctor and the demo."""
