"""Teachers and their tails, students, weights, evaluation."""
