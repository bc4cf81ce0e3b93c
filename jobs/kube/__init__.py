"""Jobs on Kubernetes: a request becomes a manifest of KubeRay, is checked, submitted, watched."""
