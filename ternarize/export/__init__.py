"""Exports: a ternarize folder in the formats that other software reads, exactly or not at all."""
