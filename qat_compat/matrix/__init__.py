"""The compatibility matrix: flow x direction x container x granularity x dtype x device, over declared models."""
