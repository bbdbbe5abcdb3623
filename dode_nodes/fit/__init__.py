"""Everything that runs a network to find numbers: the teacher, greedy λ, refinement."""
