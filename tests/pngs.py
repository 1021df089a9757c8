"""PNG files by hand."""

import struct
import zlib


def bomb(side=60_000):
    """A tiny PNG whose header claims `side` x `side` pixels."""
    header = struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0)
    return png([(b'IHDR', header), (b'IDAT', zlib.compress(b'\0' * 100)), (b'IEND', b'')])


def png(chunks):
    body = b''.join(
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b'\x89PNG\r\n\x1a\n' + body
