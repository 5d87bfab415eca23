"""What an adapter goes onto: modules and parameters by name, by role or by default, and those that it must not."""
