"""What is Kubeflow's: components and their adapter, the DAG, its pods, and how it is submitted."""
