"""Batches: {'image': [B, H, W, C], 'labels': {task: [B]}, 'mask': {task: [B]}}.

`pipeline` turns a source of examples into batches; `multi_digits`,
`multi_mnist` and `synthetic` make sources; `prepare` writes datasets to disk.
"""
