"""Fine-tuning T5 on SuperGLUE: the application that stands on the library."""
