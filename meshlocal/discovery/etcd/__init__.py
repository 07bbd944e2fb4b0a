"""Instances from etcd (API version 3): keys below a prefix, listed and then watched, and a lease for who registers."""
