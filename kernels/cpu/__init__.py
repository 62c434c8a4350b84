"""The same passes on a CPU, by loops that numba compiles: dots, norm, climb and step, with the
names and signatures of fastsam.reference.

A loop takes blocks of BLOCK elements, one by one, until none is left: each thread that runs it
takes the next. A block lies in one slot; weight and gradient are reached by the slot's address,
the flat buffers by its offset. Letters and the order of every operation are the reference's, so
that the results are: there is no fastmath, and no contraction; a number over a tensor is torch's
reciprocal and product.

A `..._loop` function makes a loop for one kind of space. What differs between kinds is compiled in;
what a user sets is read from the table of hyper-parameters.
"""

from .passes import DTYPES, climb, dots, norm, step

__all__ = ["DTYPES", "climb", "dots", "norm", "step"]
