"""What clients may see of jobs, in plain values, for what parses and describes requests."""

STATUSES = ("queued", "in_progress", "completed", "failed", "cancelled")
LISTED, MOST_LISTED = 20, 100  # jobs in an answer of GET /v1/jobs: by default, and at most
