"""Weights from and to every layout in use: read, recognised, fitted into a model with a report of every tensor, written."""

from vitcli.weights.load import LoadReport, check_architecture, load_start, load_weights, resize_pos_embed

__all__ = ["LoadReport", "check_architecture", "load_start", "load_weights", "resize_pos_embed"]
