"""What spans all phases: dry runs, the doctor and the demo."""
