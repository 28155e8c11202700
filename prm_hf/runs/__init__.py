"""A run's folder and the methods that are compared. Free of torch and of the training stack."""
