"""C++ twins of the ops: the extension qoq._C, and what hands tensors to it."""
