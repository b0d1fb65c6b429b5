"""Tracking in MLflow: one parent run per pipeline run, one child per step. Tracking never decides.

Spool first: every event is a line of ``.retort/spool/<id>/events.jsonl`` before MLflow hears of it, and is
replayed from there, while the step runs and when it ends. What could not be sent stays, and ``retort sync``
(or the next step that gets through) sends it. A replay may be repeated: runs are found by their tag
``retort.id`` before they are made, values keep the time at which they were measured.

``tracker`` is what a step works with. Behind it: ``run_identity`` (which pipeline run a step belongs to),
``spool`` (what was recorded, on this disk), ``replay`` (the spool's way into MLflow), ``client`` (MLflow's
client, and a server that may not answer).
"""
