"""One queue for the whole cluster: which request goes next, and to which replica.

Everything in it but `dispatch` is plain code over a clock that the caller reads. So it runs in the ingress, in tests
and in the simulator (capacity/cluster_simulation.py) alike. Knows nothing of Ray and of HTTP.
"""
