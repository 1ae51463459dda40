"""A rehearsal of an online A/B test: simulated people, their visits, and what is made of them."""
