"""What every room needs: findings, storage, tracking, progress. Knows no step."""
