"""The objective's sums, each a pure function in float32, and the teacher's centering."""
