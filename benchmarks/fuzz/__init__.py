"""Garbage for a stage's port: frames that are almost messages, and connections that are almost ZeroMQ's."""
