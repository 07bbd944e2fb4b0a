"""Instances from DNS: SRV records, or A and AAAA, asked for again as their time runs out."""
