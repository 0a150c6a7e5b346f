"""Lightning modules, data modules and callbacks around the package `qat`."""
