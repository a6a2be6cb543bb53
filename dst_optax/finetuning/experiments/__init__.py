"""The paper's experiments: sweeps, analyses, figures, and a report; one file each."""
