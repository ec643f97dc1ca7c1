"""Fresh runs -> tables: beside the paper, beside other tools, by threads, with denormal floats."""
