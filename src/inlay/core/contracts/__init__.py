"""What a method's author reads and writes: the method, the three contracts, pieces, an adapter and its clock."""
