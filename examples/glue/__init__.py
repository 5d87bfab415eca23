"""Fine-tune encoders on the GLUE tasks, as in the SparseGrad paper, section 5.1 and appendices B to D."""
