"""A synthetic world and its people, traffic, and the verdict on a service under load."""
