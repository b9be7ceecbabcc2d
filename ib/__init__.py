"""What flows: divergences, mutual information, transport, bottleneck objectives."""
