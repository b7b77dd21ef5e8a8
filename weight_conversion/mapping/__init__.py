"""Which tensor becomes which, and how its parts lie in it: one table per family."""
