"""A piece of work that is done again and again on the same memory (a token step) as a program of compiled calls."""
