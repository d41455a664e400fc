"""The INT4 storage format, byte by byte."""

import pytest
import torch

from dq_kernels.packing import pack_int4, sum_int4, unpack_int4

ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def signed(nibble):
    return nibble - 16 if nibble >= 8 else nibble


def random_values(*shape):
    return torch.randint(-8, 8, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))


def test_byte_j_holds_channel_j_low_and_channel_j_plus_half_high():
    values = torch.tensor([[1, -2, 7, -8, 0, -1]], dtype=torch.int8)

    assert pack_int4(values).tolist() == [[0x81, 0x0E, 0xF7]]


def test_every_byte_unpacks_to_its_two_signed_nibbles():
    expected = [signed(byte & 15) for byte in range(256)] + [signed(byte >> 4) for byte in range(256)]

    unpacked = unpack_int4(ALL_BYTES)

    assert unpacked.dtype == torch.int8
    assert unpacked.tolist() == expected


@pytest.mark.parametrize("shape", [(256, 1), (2, 128), (4, 2, 2, 16)], ids=str)
def test_sums_of_channels_are_those_of_the_unpacked_values(shape):
    packed = ALL_BYTES.reshape(shape)

    total = sum_int4(packed)
    assert total.dtype == torch.int32
    assert torch.equal(total, unpack_int4(packed).flatten(1).sum(1, dtype=torch.int32))


@pytest.mark.parametrize("byte", [0x77, 0x88])
def test_sum_of_the_longest_channel_is_exact(byte):
    channel = torch.full((1, 2**19), byte, dtype=torch.uint8)
    channel[0, 0] = 0

    assert sum_int4(channel).tolist() == [(2**19 - 1) * (14 if byte == 0x77 else -16)]


@pytest.mark.parametrize("shape", [(256,), (1, 256), (16, 16), (256, 1), (4, 2, 2, 16)], ids=str)
def test_packing_inverts_unpacking_for_every_byte(shape):
    packed = ALL_BYTES.reshape(shape)

    assert torch.equal(pack_int4(unpack_int4(packed)), packed)


def test_conv_weights_are_half_split_within_each_tap():
    out_channels, kernel_h, kernel_w, channels = 3, 2, 5, 6
    values = random_values(out_channels, kernel_h, kernel_w, channels)

    packed = pack_int4(values)

    assert packed.shape == (out_channels, kernel_h, kernel_w, channels // 2)
    assert packed.dtype == torch.uint8
    for n in range(out_channels):
        for row in range(kernel_h):
            for column in range(kernel_w):
                tap = values[n, row, column].tolist()
                expected = [(tap[j] & 15) | (tap[j + 3] & 15) << 4 for j in range(3)]
                assert packed[n, row, column].tolist() == expected
    assert torch.equal(unpack_int4(packed), values)


def test_odd_channel_count_gets_one_zero_channel():
    values = torch.tensor([[1, 2, 3, 4, -5]], dtype=torch.int8)

    packed = pack_int4(values)

    assert packed.tolist() == [[0x41, 0xB2, 0x03]]
    assert unpack_int4(packed).tolist() == [[1, 2, 3, 4, -5, 0]]


def test_weights_permuted_from_torchs_conv_layout_pack_contiguously():
    values = random_values(3, 6, 2, 5).permute(0, 2, 3, 1)

    packed = pack_int4(values)

    assert packed.is_contiguous()
    assert torch.equal(unpack_int4(packed), values)


def test_packing_leaves_its_input_alone():
    values = torch.arange(-8, 8, dtype=torch.int8)
    before = values.clone()

    pack_int4(values)

    assert torch.equal(values, before)


@pytest.mark.parametrize("bad", [-9, 8, -128, 127])
def test_value_outside_four_bits_is_refused(bad):
    values = torch.zeros(2, 4, dtype=torch.int8)
    values[1, 2] = bad

    with pytest.raises(ValueError, match=rf"pack_int4 takes values in \[-8, 7\], got .*{bad}"):
        pack_int4(values)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32], ids=str)
def test_dtype_other_than_int8_is_refused(dtype):
    with pytest.raises(ValueError, match=f"pack_int4 takes int8 values, got {dtype}"):
        pack_int4(torch.zeros(2, 4, dtype=dtype))
