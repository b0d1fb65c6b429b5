"""How steps are chained: params.yaml as a type, the command line, the KFP DAG, the report."""
