"""Writers and the check of what they wrote. They take the plan and the tensors, nothing else."""
