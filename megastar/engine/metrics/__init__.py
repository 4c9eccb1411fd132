"""What a run logs: metrics.jsonl, TensorBoard, health."""
