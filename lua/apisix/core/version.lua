--- The APISIX version whose contract this gateway keeps.
return { VERSION = "3.18.0" }
