"""SuperGLUE for text-to-text models: rows, T5's text formats, seqio tasks, metrics, submissions."""
