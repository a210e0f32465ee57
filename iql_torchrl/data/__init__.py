"""Offline data made right: readers, one checked schema, explicit scaling, TorchRL buffers."""
