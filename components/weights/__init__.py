"""Reading and converting published weights, with a proof of what was loaded."""
