"""The arithmetic of sliding windows: what a convolution or pooling does to a side, and what it lets a unit see."""


def compute_output_size(size: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> int:
    """Side of a map after a convolution or pooling, in units; all arguments are along one axis.

    floor((size + 2 * padding - dilation * (kernel - 1) - 1) / stride) + 1, as torch rounds by default: Dumoulin and
    Visin, "A guide to convolution arithmetic for deep learning", 2016, relationships 6 and 15.

    Raises:
        ValueError: if the kernel is larger than the padded map.
    """
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    if room < 0:
        raise ValueError(f"a kernel of {dilation * (kernel - 1) + 1} must fit into {size} + 2 * {padding} pixels")
    return room // stride + 1


def extend_receptive_field(field: int, jump: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Field and jump behind one more convolution or pooling, along one axis; a pixel's own are (1, 1).

    The field is the side of the part of the image that a unit sees, the jump the distance between the parts of two
    neighbouring units, both in pixels of the image. It adds one term to the closed form for a single path of Araujo,
    Norris and Sim, "Computing receptive fields of convolutional neural networks", Distill 2019.
    """
    return field + dilation * (kernel - 1) * jump, jump * stride
