"""Jobs on a Ray cluster that runs already, by Ray's own job API: no Kubernetes."""
