"""What every room needs: findings, storage, parameters, progress. Knows no step."""
